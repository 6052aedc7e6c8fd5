"""The encoder: weights that fit or say why not, vectors that are units and do not depend on company."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from pipeline.embeddings.decoding import Threads
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.embeddings.pixels import ImageFacts, Pixels, pixels_of_bytes
from pipeline.embeddings.queries import embed_images
from pipeline.embeddings.stream import embed_items
from pipeline.embeddings.weights import weights_of, weights_sha256
from pipeline.errors import DamagedFile, EncoderError
from pipeline.images.containers.items import Item
from pipeline.images.decoding.decode import Rejected
from pipeline.store.storage.local import LocalStorage
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.images.pictures import gradient


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (19, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def test_vectors_are_units_of_the_stated_dimension(encoder: Encoder, pixels: np.ndarray) -> None:
    vectors = encoder.embed(pixels)
    assert vectors.shape == (19, encoder.identity.dimension) == (19, 1280)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors.astype(np.float64), axis=1) == pytest.approx(np.ones(19), abs=1e-6)


def test_a_query_does_not_depend_on_what_is_asked_with_it(encoder: Encoder, pixels: np.ndarray) -> None:
    together = encoder.embed_queries(pixels)
    for query in range(0, 19, 6):
        assert (encoder.embed_queries(pixels[query : query + 1])[0] == together[query]).all()
    assert (encoder.embed_queries(pixels[::-1])[::-1] == together).all()


def test_a_query_does_not_depend_on_the_number_of_threads(encoder: Encoder, pixels: np.ndarray) -> None:
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, threads):
        torch.set_num_threads(number)
        found.append(encoder.embed_queries(pixels[:4]))
        assert torch.get_num_threads() == number
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "L", "CMYK", "P"])
def test_a_pil_image_is_seen_as_its_file_would_be(encoder: Encoder, tmp_path: Path, mode: str) -> None:
    picture = gradient().convert(mode)
    if mode == "RGBA":
        picture.putalpha(gradient().convert("L"))
    path = tmp_path / "picture.tiff"
    picture.save(path)
    vectors, uris = embed_images(encoder, [path, path.read_bytes(), Image.open(path)])
    assert (vectors[0] == vectors[1]).all()
    assert (vectors[0] == vectors[2]).all()
    assert uris == [str(path), None, None]


def test_an_encoder_opened_from_a_memory_is_the_same(encoder: Encoder, pixels: np.ndarray, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    file = encoder.keep(storage)
    assert file.path == f"encoder/{encoder.identity.weights_sha256}.safetensors"
    opened = Encoder.open(storage, encoder.identity)
    assert (opened.embed(pixels) == encoder.embed(pixels)).all()
    kept = safetensors.torch.load_file(str(storage.local_path(file.path)))
    assert weights_sha256(kept) == encoder.identity.weights_sha256


def test_altered_weights_in_a_memory_are_found(encoder: Encoder, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    path = storage.local_path(encoder.keep(storage).path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match="does not hold the weights it is named after"):
        Encoder.open(storage, encoder.identity)


def test_weights_by_name_equal_weights_by_position(encoder: Encoder, tmp_path: Path, weights: str) -> None:
    named = Encoder.load(EncoderChoice(ENCODER, str(_saved(encoder, tmp_path / "w.safetensors")), "name", IMAGE_SIZE))
    assert named.identity == encoder.identity


def _saved(encoder: Encoder, path: Path) -> Path:
    safetensors.torch.save_file({n: t.contiguous() for n, t in weights_of(encoder._model).items()}, str(path))
    return path


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_checkpoints_in_their_usual_wrappings(tmp_path: Path, wrap) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False)  # with its head, which is left out
    torch.save(wrap(model.state_dict()), tmp_path / "w.pth")
    loaded = Encoder.load(EncoderChoice("resnet10t", str(tmp_path / "w.pth"), "name", 32))
    headless = timm.create_model("resnet10t", pretrained=False, num_classes=0)
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")})
    assert loaded.identity.weights_sha256 == weights_sha256(weights_of(headless))


def test_a_vit_is_seen_at_the_size_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), tmp_path / "w.pth")
    loaded = Encoder.load(EncoderChoice("vit_tiny_patch16_224", str(tmp_path / "w.pth"), "name", 64))
    assert loaded.identity.preprocessing.crop == 64
    vectors = loaded.embed(np.zeros((2, 64, 64, 3), np.uint8))
    assert vectors.shape == (2, 192)


class Code:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (EncoderChoice("no_such_model"), "timm .* has no model named no_such_model"),
        (EncoderChoice("resnet10t", "{tmp}/nowhere.pth"), "there are no weights at .*nowhere.pth"),
        (EncoderChoice("resnet10t", "{tmp}/text.pth"), "cannot be read"),
        (EncoderChoice("resnet10t", "{tmp}/code.pth"), "cannot be read"),
        (EncoderChoice("resnet10t", "{tmp}/list.pth"), "no state dictionary"),
        (EncoderChoice("resnet10t", "{lite0}"), "do not fit the model: .* missing .*positional"),
        (EncoderChoice("resnet10t", "{lite0}", "positional"), "247 tensors and the model has"),
        (EncoderChoice("vit_tiny_patch16_224", "{tmp}/empty.pth"), "do not fit the model"),
        (EncoderChoice("resnet10t", "{tmp}/w.safetensors", "positional"), "safetensors keep no order"),
    ],
)
def test_wrong_encoders_are_named(choice: EncoderChoice, message: str, weights: str, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    torch.save(Code(), tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    safetensors.torch.save_file({"a": torch.zeros(1)}, str(tmp_path / "w.safetensors"))
    path = choice.weights.format(tmp=tmp_path, lite0=weights) if choice.weights else None
    with pytest.raises(EncoderError, match=message):
        Encoder.load(EncoderChoice(choice.name, path, choice.weights_order))


def test_an_unreadable_image_does_not_touch_its_neighbours(encoder: Encoder, digits: Path) -> None:
    paths = [str(path) for path in sorted((digits / "remember").rglob("*.png"))[:20]]
    [*clean] = embed_items(encoder, [Item(path, None) for path in paths], Threads(2))
    with_gap = [*paths]
    with_gap[3] = "/nowhere.png"
    [*gap] = embed_items(encoder, [Item(path, None) for path in with_gap], Threads(2))
    vectors, gapped = (np.concatenate([batch.vectors_BD for batch in batches]) for batches in (clean, gap))
    keep = np.arange(20) != 3
    assert (vectors[keep] == gapped[keep]).all()
    images = [image for batch in gap for image in batch.images]
    assert isinstance(images[3], Rejected)
    assert sum(isinstance(image, ImageFacts) for image in images) == 19


def test_loaded_pixels_say_what_an_entry_keeps(encoder: Encoder, digits: Path) -> None:
    path = next((digits / "ask/0").iterdir())
    loaded = pixels_of_bytes(path.read_bytes(), encoder.identity.preprocessing)
    assert isinstance(loaded, Pixels)
    assert (loaded.facts.width, loaded.facts.height) == (28, 28)
    assert loaded.pixels_SS3.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
