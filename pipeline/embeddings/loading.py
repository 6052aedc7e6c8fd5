"""Encoders are loaded here, so that nothing else imports torch, which takes seconds and may not be installed."""

from typing import TYPE_CHECKING

from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.extras import needed_for
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.identity import Identity

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder


def load_encoder(choice: EncoderChoice) -> "Encoder":
    """A timm model by name. Raises EncoderError, and MissingExtra if torch or timm is not installed."""
    with needed_for("embedding images"):
        from pipeline.embeddings.encoder import Encoder

    return Encoder.load(choice)


def open_encoder(storage: Storage, identity: Identity) -> "Encoder":
    """The encoder of a memory, from the weights stored in it. Raises DamagedFile, EncoderError or MissingExtra."""
    with needed_for("embedding images"):
        from pipeline.embeddings.encoder import Encoder

    return Encoder.open(storage, identity)
