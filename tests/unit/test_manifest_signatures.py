"""A signing key: what this run did not sign is never restored, and a typo in a Secret condemns nothing."""

from __future__ import annotations

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests import a_manifest
from mend.keys import checkpoint_key
from mend.manifest import (
    MANIFEST_VERSION,
    Manifest,
    UnreadableManifest,
    Untrusted,
    decode_manifest,
    encode_manifest,
    misplacement,
    signing_key,
)

SECRET = b"a secret of the tests, long enough"
KEY = signing_key(SECRET, "team/clio")


def one_save(**changes: object) -> Manifest:
    """A small manifest of one save."""
    return a_manifest(**({"step": 12, "attempt": 3, "save_id": "aa", "tokens": 4096} | changes))


def test_a_signed_manifest_is_read_with_and_without_the_key() -> None:
    """Signing changes nothing for those who ask for no signature, an older mend among them."""
    raw = encode_manifest(one_save(), KEY)
    assert decode_manifest(raw, KEY) == decode_manifest(raw) == one_save()


def test_without_its_signature_a_manifest_is_not_trusted() -> None:
    """A downgrade, that is the same manifest written again without a signature, is refused and not called damaged."""
    with pytest.raises(Untrusted, match="not signed"):
        decode_manifest(encode_manifest(one_save()), KEY)


def test_a_manifest_of_another_run_is_not_trusted() -> None:
    """Also if that run signs with the same Secret, and although it tells this run's name."""
    other = signing_key(SECRET, "team/dora")
    for replayed in (encode_manifest(one_save(run="team/dora"), other), encode_manifest(one_save(), other)):
        with pytest.raises(Untrusted, match="not by this run's"):
            decode_manifest(replayed, KEY)


def test_a_signature_moved_to_another_manifest_is_not_trusted() -> None:
    """Of two rightly signed manifests no mixture is believed, whatever its digest."""
    head = len(b'{"digest":"' + b"0" * 32 + b'",')
    cut = head + len(b'"signature":"' + b"0" * 64 + b'",')
    signed, later = (encode_manifest(one_save(step=step), KEY) for step in (12, 13))
    mixed = signed[head:cut] + later[cut:]
    raw = b'{"digest":"%s",' % xxhash.xxh3_128_hexdigest(mixed).encode() + mixed
    assert decode_manifest(raw).step == 13
    with pytest.raises(Untrusted):
        decode_manifest(raw, KEY)


def test_what_a_newer_mend_did_not_sign_stops_nobody() -> None:
    """Else whoever may write to the bucket could stop the run with an invented version."""
    with pytest.raises(Untrusted):
        decode_manifest(encode_manifest(one_save(version=MANIFEST_VERSION + 1)), KEY)


@settings(max_examples=200)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_damage_and_not_distrust(position: float, bit: int) -> None:
    """A signed manifest with a flipped bit is refused as damaged, so that it is marked and the one before it taken."""
    raw = bytearray(encode_manifest(one_save(), KEY))
    raw[int(position * len(raw))] ^= 1 << bit
    with pytest.raises(UnreadableManifest) as caught:
        decode_manifest(bytes(raw), KEY)
    assert not isinstance(caught.value, Untrusted)


@pytest.mark.parametrize(("step", "attempt", "save"), [(13, 3, "aa"), (12, 4, "aa"), (12, 3, "ab"), (12, 3, "a")])
def test_a_manifest_belongs_in_one_folder(step: int, attempt: int, save: str) -> None:
    """Swapped between steps, attempts or saves it is no longer that of the folder it lies in."""
    manifest = one_save()
    assert misplacement(manifest, checkpoint_key(12, 3, "aa")) == ""
    assert "step 12 of attempt 3" in misplacement(manifest, checkpoint_key(step, attempt, save))


def test_a_manifest_from_before_saves_had_names_belongs_to_its_step_and_attempt() -> None:
    """It is still restored, and still not taken for another step's."""
    manifest = one_save(save_id="")
    assert misplacement(manifest, checkpoint_key(12, 3, "whatever")) == ""
    assert misplacement(manifest, checkpoint_key(13, 3, "whatever"))


def test_a_manifest_that_does_not_name_its_save_is_not_signed() -> None:
    """It could be moved to another save of its step, and its signature would hold there."""
    with pytest.raises(ValueError, match="save_id"):
        encode_manifest(one_save(save_id=""), KEY)


def test_a_secret_that_could_be_guessed_is_refused() -> None:
    """The error says how long it must be, and how to make one."""
    with pytest.raises(ValueError, match=r"expected 16 at least .*openssl rand"):
        signing_key(b"short", "team/clio")


def test_an_older_manifest_is_read_as_ever() -> None:
    """What was written before there were signatures and names of saves has neither, and decodes."""
    old = msgspec.json.decode(msgspec.json.encode(one_save()), type=dict)
    del old["save_id"]
    assert msgspec.convert(old, Manifest) == one_save(save_id="")
