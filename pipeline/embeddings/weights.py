"""Weights: read from a file or URI, fitted to a timm model by name or by position, hashed, stored in the memory."""

import errno
import hashlib
import sys
from typing import Any

import fsspec
import safetensors
import safetensors.torch
import torch

from pipeline.errors import DamagedFile, EncoderError
from pipeline.store.storage.file_refs import UNREADABLE, FileRef, describe
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.identity import Identity

Tensors = dict[str, torch.Tensor]

SAFETENSORS = ".safetensors"

_COUNTERS = "num_batches_tracked"
_NESTED_UNDER = ("state_dict", "state_dict_ema", "model", "model_ema", "teacher", "student")
_WRAPPERS = ("module.", "backbone.", "_orig_mod.")


def read_weights(uri: str) -> Tensors:
    """The tensors of a `.safetensors` or torch file at a path or fsspec URI.

    torch files are loaded with `weights_only=True`, so no code in them runs. Raises EncoderError.
    """
    try:
        with fsspec.open(uri, "rb") as stream:
            if uri.endswith(SAFETENSORS):
                return safetensors.torch.load(stream.read())
            loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise EncoderError(f"there are no weights at {uri}: check the path given with `weights`") from error
    except PermissionError as error:
        raise EncoderError(f"permission denied: the weights at {uri} may not be read: allow this user to") from error
    except Exception as error:  # damaged pickles, archives and headers raise many types of errors
        raise EncoderError(
            f"the weights at {uri} cannot be read: they are no .safetensors or torch file of tensors alone, or damaged"
        ) from error
    return _tensors_in(loaded, uri)


def fit_by_name(model: torch.nn.Module, tensors: Tensors, uri: str) -> None:
    """Load tensors by name into a model without a classifier head; a head in the file is ignored.

    If names or shapes differ, timm's filter for the architecture converts the tensors first: original checkpoints then
    fit, and position embeddings are resampled. Raises EncoderError naming tensors that are missing, left over or of
    another shape.
    """
    for wrapper in _WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    wanted = weights_of(model)
    tensors = {name: t for name, t in tensors.items() if not name.endswith(_COUNTERS)}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None and not _fits(wanted, tensors):
        tensors = convert(tensors, model)
    heads = _head_prefixes(model)
    tensors = {n: t for n, t in tensors.items() if n in wanted or not n.startswith(heads)}
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    other_shape = [name for name in wanted if name in tensors and wanted[name].shape != tensors[name].shape]
    if missing or unexpected or other_shape:
        faults = [
            f"{len(names)} {what} ({names[0]}{', …' if len(names) > 1 else ''})"
            for names, what in (
                (missing, "missing"),
                (unexpected, "not in the model"),
                (other_shape, "of another shape"),
            )
            if names
        ]
        raise EncoderError(
            f"the weights at {uri} do not fit the model: {'; '.join(faults)} of {len(wanted)} tensors; give the "
            "weights of this model, or `weights_order` positional if only the names differ"
        )
    model.load_state_dict(tensors, strict=False)


def fit_by_position(model: torch.nn.Module, tensors: Tensors, uri: str) -> None:
    """Load tensors in file order into a model that has its head. Their number and every shape are checked.

    `num_batches_tracked` counters are ignored: inference does not use them. Raises EncoderError.
    """
    if uri.endswith(SAFETENSORS):
        raise EncoderError(
            f"the weights at {uri} cannot be matched by position, since safetensors keep no order: "
            "give a torch file, or weights whose names are the model's"
        )
    wanted = list(weights_of(model).items())
    given = [(name, t) for name, t in tensors.items() if not name.endswith(_COUNTERS)]
    if len(wanted) != len(given):
        raise EncoderError(
            f"the weights at {uri} hold {len(given)} tensors and the model has {len(wanted)}: they "
            "belong to another model"
        )
    for (name, ours), (their_name, theirs) in zip(wanted, given, strict=True):
        if ours.shape != theirs.shape:
            raise EncoderError(
                f"the weights at {uri} do not fit by position: {their_name} is {list(theirs.shape)} where {name} is "
                f"{list(ours.shape)}; they belong to another model"
            )
    model.load_state_dict({name: theirs for (name, _), (_, theirs) in zip(wanted, given, strict=True)}, strict=False)


def weights_of(model: torch.nn.Module) -> Tensors:
    """A model's tensors without the `num_batches_tracked` counters, which inference does not use."""
    return {name: t for name, t in model.state_dict().items() if not name.endswith(_COUNTERS)}


def weights_sha256(tensors: Tensors) -> str:
    """Hexadecimal sha256 over name, dtype, shape and bytes of each tensor, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def keep_weights(storage: Storage, identity: Identity, tensors: Tensors) -> FileRef:
    """Copy the weights in use into the memory unless it holds them undamaged."""
    path = identity.weights_path
    try:
        kept_weights(storage, identity)
    except DamagedFile:
        with storage.publishing(path) as local:
            try:
                safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, str(local))
            except safetensors.SafetensorError as error:  # safetensors raises this for a full disk
                raise OSError(errno.EIO, f"the weights cannot be written: {error}", path) from error
    return describe(path, storage.local_path(path))


def kept_weights(storage: Storage, identity: Identity) -> Tensors:
    """The weights stored in a memory. Raises DamagedFile if they are missing or altered."""
    path = storage.local_path(identity.weights_path)
    try:
        tensors = safetensors.torch.load_file(str(path))
    except (safetensors.SafetensorError, *UNREADABLE) as error:
        raise _damaged(storage, identity) from error
    if weights_sha256(tensors) != identity.weights_sha256:
        raise _damaged(storage, identity)
    return tensors


def _damaged(storage: Storage, identity: Identity) -> DamagedFile:
    return DamagedFile(
        f"{identity.weights_path} in the memory at {storage.uri} does not hold the weights it is named after: "
        "restore it from a copy of the memory"
    )


def _tensors_in(loaded: Any, uri: str) -> Tensors:
    for key in _NESTED_UNDER:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise EncoderError(f"the weights at {uri} hold no state dictionary: save model.state_dict() and give that file")
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _fits(wanted: Tensors, tensors: Tensors) -> bool:
    return all(name in tensors and tensors[name].shape == tensor.shape for name, tensor in wanted.items())


def _head_prefixes(model: torch.nn.Module) -> tuple[str, ...]:
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)
