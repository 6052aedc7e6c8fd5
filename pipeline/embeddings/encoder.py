"""A frozen timm model on a torch device: pixels in, unit vectors out. It handles no image files and no Ray.

Shapes: B images, S pixels a side, D dimensions.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import timm
import torch
from timm.data.config import resolve_model_data_config

from pipeline.embeddings import hub
from pipeline.embeddings import weights as weight_files
from pipeline.embeddings.encoder_choice import DEFAULT_ENCODER, EncoderChoice
from pipeline.embeddings.preprocessing import preprocessing_for
from pipeline.errors import DamagedFile, EncoderError
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.identity import Identity

# On a CPU, small batches stay in cache: tf_efficientnet_lite0 at 96 pixels, channels-last, 2 threads, embeds 578
# images/s at 16 and 297 at 64 (docs/benchmarks.md). A GPU gains nothing above 256 with ViT-L (timm's benchmarks).
CPU_BATCH = 16
GPU_BATCH = 256
GPU_QUERY_BATCH = 16

MAX_PATCH_EMBEDDINGS = 2  # convolutions that a transformer can have to cut the image into patches


class Encoder:
    """A model with its identity. Create it with `Encoder.load` or `Encoder.open`."""

    def __init__(self, model: torch.nn.Module, identity: Identity, device: str | None = None) -> None:
        self.identity = identity
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self._forward: Callable[[torch.Tensor], torch.Tensor] = self._model
        self._bfloat16 = False
        convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
        self._convolutional = convolutions > MAX_PATCH_EMBEDDINGS
        self._mean = torch.tensor(identity.pixels.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(identity.pixels.std, device=self.device).view(1, 3, 1, 1)

    @staticmethod
    def use_cores(num_cpus: int) -> None:
        """Make the models of this process compute with `num_cpus` threads."""
        torch.set_num_threads(num_cpus)

    @classmethod
    def load(cls, choice: EncoderChoice, device: str | None = None) -> "Encoder":
        """A timm model by name, with weights from timm's hub or from a file. Raises EncoderError."""
        name = choice.name or DEFAULT_ENCODER
        hub = choice.weights is None
        model = _create(name, choice.image_size, pretrained=hub, headless=choice.weights_order == "name")
        if choice.weights is not None:
            tensors = weight_files.read_weights(choice.weights)
            fit = weight_files.fit_by_name if choice.weights_order == "name" else weight_files.fit_by_position
            fit(model, tensors, choice.weights)
            model.reset_classifier(0)  # type: ignore[operator]  # every timm model has it
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        preprocessing = preprocessing_for(config, name, choice.image_size, choice.decoding)
        identity = Identity(
            encoder=name,
            weights_sha256=weight_files.weights_sha256(weight_files.weights_of(model)),
            preprocessing=preprocessing,
            dimension=_dimension(model, name, preprocessing.crop),
        )
        return cls(model, identity, device)

    @classmethod
    def open(cls, storage: Storage, identity: Identity, device: str | None = None) -> "Encoder":
        """The encoder of a memory, from the weights stored in it. Raises DamagedFile or EncoderError."""
        crop = identity.pixels.crop
        tensors = weight_files.kept_weights(storage, identity)
        model = _create(identity.encoder, crop, pretrained=False, headless=True)
        built = weight_files.weights_of(model)
        if {name: t.shape for name, t in built.items()} != {name: t.shape for name, t in tensors.items()}:
            raise EncoderError(
                f"timm {timm.__version__} builds {identity.encoder} with other tensors than the memory at "
                f"{storage.uri} holds: install the timm release it was made with"
            )
        model.load_state_dict(tensors, strict=False)
        return cls(model, identity, device)

    def keep(self, storage: Storage) -> FileRef:
        """Copy the weights into a memory unless it holds them already."""
        return weight_files.keep_weights(storage, self.identity, weight_files.weights_of(self._model))

    @property
    def batch_size(self) -> int:
        """Images per full batch: a constant of the device, so that equal plans are cut into equal batches."""
        return CPU_BATCH if self.device.type == "cpu" else GPU_BATCH

    def embed(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        """Vectors of unit length, float32 [B, D], of uint8 [B, S, S, 3] pixels in one batch.

        Convolutions choose their algorithm by batch size, so the last bits of a vector can depend on B. Raises
        DamagedFile if the model returns a vector that is not finite.
        """
        return self.begin(pixels_BSS3)()

    def begin(self, pixels_BSS3: np.ndarray) -> Callable[[], np.ndarray]:
        """Start embedding; return a function that waits for the vectors. A GPU can take the next batch meanwhile."""
        on_gpu = self.device.type == "cuda"
        # Copy bytes and normalise them on the device. Pinned memory lets the copy run without blocking this thread.
        host = torch.empty(pixels_BSS3.shape, dtype=torch.uint8, pin_memory=on_gpu)
        host.numpy()[...] = pixels_BSS3
        with torch.inference_mode():
            pixels = host.to(self.device, non_blocking=True)
            inputs = pixels.permute(0, 3, 1, 2).float().div_(255.0).sub_(self._mean).div_(self._std)
            with torch.autocast(self.device.type, torch.bfloat16) if self._bfloat16 else nullcontext():
                vectors = self._forward(inputs.contiguous(memory_format=torch.channels_last))
            found = vectors = torch.nn.functional.normalize(vectors.float(), dim=1)
            if on_gpu:
                found = torch.empty(vectors.shape, pin_memory=True).copy_(vectors, non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()

        def wait() -> np.ndarray:
            if on_gpu:
                copied.synchronize()
            vectors_BD = found.numpy()
            if not np.isfinite(vectors_BD).all():
                raise DamagedFile(f"{self.identity.encoder} gave vectors that are not finite: its weights are damaged")
            return vectors_BD

        return wait

    def in_bfloat16(self) -> "Encoder":
        """This encoder with `embed` in bfloat16 wherever torch's autocast uses it. Queries stay in float32."""
        fast = copy.copy(self)
        fast._bfloat16 = True
        return fast

    def compiled(self) -> "Encoder":
        """This encoder with `embed` compiled for batches of `batch_size`. Raises EncoderError if that fails."""
        fast, crop = copy.copy(self), self.identity.pixels.crop
        try:
            fast._forward = torch.compile(self._model, dynamic=False)
            fast.embed(np.zeros((self.batch_size, crop, crop, 3), np.uint8))
        except Exception as error:  # compilers raise many types, e.g. without a C compiler or on an unknown GPU
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EncoderError(f"{self.identity.encoder} cannot be compiled ({reason})") from error
        return fast

    def embed_queries(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        """Like `embed`, float32 [B, D], but the bits of a vector do not depend on the other queries of the call.

        Every forward pass has one fixed shape: a single image on a CPU, a padded batch on a GPU. Convolutions on a CPU
        run on one thread, because their last bits depend on the number of threads. For one image more threads gain
        nothing (docs/benchmarks.md). Transformers use all threads: their products were the same on any number.
        """
        threads = torch.get_num_threads()
        if self._convolutional and self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            return self._embed_one_shape(pixels_BSS3)
        finally:
            torch.set_num_threads(threads)

    def _embed_one_shape(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        step = 1 if self.device.type == "cpu" else GPU_QUERY_BATCH
        exact = copy.copy(self)
        exact._forward, exact._bfloat16 = self._model, False
        vectors = []
        for start in range(0, len(pixels_BSS3), step):
            batch = pixels_BSS3[start : start + step]
            padding = np.zeros((step - len(batch), *batch.shape[1:]), np.uint8)
            vectors.append(exact.embed(np.concatenate([batch, padding]))[: len(batch)])
        return np.concatenate(vectors) if vectors else np.empty((0, self.identity.dimension), np.float32)


def _create(name: str, image_size: int | None, *, pretrained: bool, headless: bool) -> torch.nn.Module:
    architecture = name.removeprefix("timm/")
    if architecture.split(".")[0] not in timm.list_models():
        similar = timm.list_models(f"*{architecture.split('.')[0][:12]}*")[:3]
        hint = f"such as {', '.join(similar)}" if similar else "timm.list_models() lists them"
        raise EncoderError(f"timm {timm.__version__} has no model named {name}: give one it has, {hint}")
    options: dict[str, Any] = {"num_classes": 0} if headless else {}
    silent: str | None = None
    try:
        if image_size is None and "dinov2" in name:
            image_size = 224
        if image_size is not None and _has_fixed_input(architecture):
            options["img_size"] = image_size
        if not pretrained:
            return timm.create_model(architecture, pretrained=False, **options)
        with hub.ask_once() as silent:
            return timm.create_model(architecture, pretrained=True, **options)
    except (
        Exception
    ) as error:  # timm, the hub and torch raise many types; all mean that this encoder cannot be created here
        reason = silent or (str(error).splitlines() or [type(error).__name__])[0]
        if pretrained:
            raise EncoderError(
                f"the weights of {name} could not be fetched from timm's hub ({reason}): check the network, "
                "or give `weights` FILE"
            ) from error
        raise EncoderError(
            f"timm cannot build {name}{f' at {image_size} pixels' if image_size else ''}: {reason}"
        ) from error


def _has_fixed_input(architecture: str) -> bool:
    config = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    return bool(config and config.fixed_input_size)


def _dimension(model: torch.nn.Module, name: str, crop: int) -> int:
    """Run the model to get its dimension: timm's `num_features` is not the pooled width of every architecture."""
    try:
        with torch.inference_mode():
            output = model.eval()(torch.zeros(1, 3, crop, crop))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EncoderError(
            f"{name} cannot take images of {crop} pixels ({reason}): give another `image_size`"
        ) from error
    if output.ndim != 2:
        raise EncoderError(f"{name} gives no single vector an image: choose a model that pools its features")
    return int(output.shape[1])
