"""Settles the identity of an add from the memory, the user's choice, and the makers recorded in files of vectors."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.embeddings.encoder_choice import PIXEL_PATHS, EncoderChoice
from pipeline.embeddings.loading import load_encoder, open_encoder
from pipeline.errors import IdentityMismatch, SourceError, UsageError
from pipeline.extras import needed_for
from pipeline.images.containers.container import GivenVectors
from pipeline.images.containers.vector_columns import Maker
from pipeline.images.sources.listing import Listing
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.tables.identity import GIVEN, Identity

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder

_ONE_ENCODER = "leave out `encoder`, `weights`, `image_size` and `decoding` to use its own, or start another memory"


def settle_identity(
    log: VersionLog,
    state: State | None,
    listing: Listing,
    choice: EncoderChoice,
    load: "Callable[[], Encoder] | None" = None,
) -> "tuple[Identity, Encoder | None]":
    """The identity to add a source under, and the encoder if the add embeds images or names a new encoder.

    If the memory has an identity, the add uses it. `load` returns that identity's encoder if the caller holds it. A new
    memory of vectors alone has an identity of given vectors unless the user names an encoder. Raises IdentityMismatch
    for vectors or an encoder of another identity, SourceError for another dimension, UsageError, EncoderError.
    """
    own = state.identity if state is not None else None
    encoder = None
    if own is not None:
        _refuse_other(log.storage.uri, own, choice)
        identity = own
    elif choice.is_given or (choice.says_nothing and not listing.holds_images):
        identity = _of_given(listing, choice)
    else:
        encoder = load_encoder(choice)
        identity = encoder.identity
    if listing.given is not None:
        check_vectors(listing.given, identity, named=choice.name is not None)
    return identity, _encoder_for(log, identity, encoder, listing, choice, load)


def settle_as_planned(
    log: VersionLog,
    state: State | None,
    listing: Listing,
    planned: Identity,
    choice: EncoderChoice,
    load: "Callable[[], Encoder] | None" = None,
) -> "tuple[bool, Encoder | None]":
    """Whether an unfinished add of identity `planned` is still what is asked for; and its encoder, or None.

    Like `settle_identity`, but the vectors of the source were checked when it was planned. Raises IdentityMismatch or
    EncoderError.
    """
    own = state.identity if state is not None else None
    identity: Identity | None
    encoder = None
    if own is not None:
        _refuse_other(log.storage.uri, own, choice)
        identity = own
    elif planned.is_given and (choice.is_given or choice.says_nothing):
        identity = planned if choice.name in (None, planned.encoder) else None
    else:
        encoder = load_encoder(choice)
        identity = encoder.identity
    if identity != planned:
        return False, None
    return True, _encoder_for(log, planned, encoder, listing, choice, load)


def _encoder_for(
    log: VersionLog,
    identity: Identity,
    loaded: "Encoder | None",
    listing: Listing,
    choice: EncoderChoice,
    load: "Callable[[], Encoder] | None",
) -> "Encoder | None":
    """The encoder of an add: the one loaded already, or the memory's own if there are images to embed."""
    if loaded is not None or not listing.holds_images:
        return loaded
    _ = identity.pixels  # raises for an identity of given vectors, which has no preprocessing
    return load() if load is not None and choice.says_nothing else open_encoder(log.storage, identity)


def check_vectors(given: GivenVectors, identity: Identity, *, named: bool = True) -> None:
    """Check that the vectors of a source can be compared with the vectors of an identity.

    With `named`, vectors that do not name their encoder are accepted: the user named it, or the query stores nothing.
    Raises SourceError for another dimension, IdentityMismatch for another maker, UsageError for vectors of an unknown
    maker without `named`.
    """
    if given.dimension != identity.dimension:
        raise SourceError(
            f"the vectors in {given.makers[0].uri} have {given.dimension:,} dimensions and cannot be compared with "
            f"those of {identity}: give vectors by the same encoder"
        )
    for maker in given.makers:
        if maker.fingerprint in (None, identity.fingerprint):
            if maker.fingerprint is None and not (named or identity.is_given):
                raise UsageError(
                    f"the vectors in {maker.uri} do not say by which encoder they are, and the memory is one of "
                    f"{identity}: if they are by the same, say so with `encoder` {identity.encoder}"
                )
        elif _name(maker) != identity.encoder:
            raise IdentityMismatch(
                f"the vectors in {maker.uri} are by {maker.encoder} (fingerprint {str(maker.fingerprint)[:12]}), not "
                f"by {identity} (fingerprint {identity.fingerprint[:12]}): add them to a memory of their own"
            )


def refuse_mix(uri: str, own: Identity, asked: Identity) -> None:
    """Raises IdentityMismatch unless the memory's identity is the one asked for."""
    if own != asked:
        raise IdentityMismatch(f"the memory at {uri} is one of {own}, not of {asked}: {_ONE_ENCODER}")


def _refuse_other(uri: str, own: Identity, choice: EncoderChoice) -> None:
    """Raises IdentityMismatch if the user asks for another encoder than the memory's own."""
    crop = own.preprocessing.crop if own.preprocessing is not None else None
    said = choice.name or own.encoder, choice.image_size or crop
    if said != (own.encoder, crop) or (own.is_given and choice.weights is not None):
        asked = f"{said[0]} at {said[1]} pixels" if said[1] else said[0]
        asked += " with weights" if own.is_given and choice.weights is not None else ""
        raise IdentityMismatch(f"the memory at {uri} is one of {own}, not of {asked}: {_ONE_ENCODER}")
    if choice.decoding is not None and (own.is_given or PIXEL_PATHS[choice.decoding] != own.pixels.pixel_path):
        asked = f"decoding {choice.decoding}"
        raise IdentityMismatch(f"the memory at {uri} is one of {own}, not of {asked}: {_ONE_ENCODER}")
    if choice.weights is not None:
        own_decoding = next(name for name, pixel_path in PIXEL_PATHS.items() if pixel_path == own.pixels.pixel_path)
        with needed_for("reading weights"):
            from pipeline.embeddings.weights import read_weights

        read_weights(choice.weights)  # report a wrong path before a mismatch
        asked_for = EncoderChoice(own.encoder, choice.weights, choice.weights_order, crop, own_decoding)
        refuse_mix(uri, own, load_encoder(asked_for).identity)


def _of_given(listing: Listing, choice: EncoderChoice) -> Identity:
    if listing.holds_images:
        raise UsageError(
            f"`encoder` {choice.name} stands for vectors without an encoder, and {listing.uri} holds images too: name "
            "the timm model that the vectors are by, or add them from a folder of their own"
        )
    if listing.given is None:
        raise SourceError(f"no file in {listing.uri} has a vector in it, so there is nothing to add: check the source")
    names = [_name(maker) for maker in listing.given.makers if maker.fingerprint is not None]
    return Identity.of_given(choice.name or next(iter(names), GIVEN), listing.given.dimension)


def _name(maker: Maker) -> str:
    """The name for vectors of a known maker whose encoder is not available; its fingerprint keeps makers apart."""
    encoder = maker.encoder or ""
    return encoder if encoder.partition(":")[0] == GIVEN else f"{GIVEN}:{encoder}@{str(maker.fingerprint)[:12]}"
