"""Text is packed once per machine, whoever asks and whatever dies meanwhile, and the same everywhere."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mend_trainer.data import shards
from mend_trainer.data.corpus import NoText, find_documents
from mend_trainer.data.shards import DamagedShards, pack


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A hundred small documents, some in a subfolder, some hidden."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for number in range(100):
        (folder / ("deep" if number % 2 else "") / f"{number:02d}.txt").write_text(f"document {number}\n" * 5)
    (folder / ".hidden").write_text("not this")
    return folder


def test_all_text_is_there_once_and_documents_are_held_out_whole(corpus: Path, tmp_path: Path) -> None:
    """Train and held-out together hold every byte and an end mark per document, in order of names."""
    packed = pack(str(corpus), tmp_path / "cache", shard_tokens=300)
    assert len(packed.train.parts) > 1
    tokens = [packed.train.read(0, packed.train.tokens), packed.held_out.read(0, packed.held_out.tokens)]
    texts = [bytes(token if token < 256 else 0 for token in split).split(b"\0")[:-1] for split in tokens]
    names = sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("[0-9]*.txt"))
    expected = [(corpus / name).read_bytes() for name in names]
    assert sorted(texts[0] + texts[1]) == sorted(expected)
    assert [text for text in expected if text in texts[0]] == texts[0]
    assert 0 < len(texts[1]) < 20


def test_the_digest_depends_on_the_text_alone(corpus: Path, tmp_path: Path) -> None:
    """Another machine, another time: the same digest. One byte more: another."""
    one = pack(str(corpus), tmp_path / "one")
    os.utime(corpus / "00.txt", (1, 1))
    two = pack(str(corpus), tmp_path / "two")
    (corpus / "00.txt").write_text("changed")
    three = pack(str(corpus), tmp_path / "two")
    assert one.digest == two.digest != three.digest


def test_ranks_that_race_pack_once(corpus: Path, tmp_path: Path) -> None:
    """Processes that ask at once all find the same shards, and only one wrote them."""
    script = (
        "import sys, pathlib; from mend_trainer.data import shards\n"
        "real = shards._write\n"
        "shards._write = lambda *args: (print('wrote'), real(*args))\n"
        "print(shards.pack(sys.argv[1], pathlib.Path(sys.argv[2])).digest)\n"
    )
    command = [sys.executable, "-c", script, str(corpus), str(tmp_path / "cache")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(racer.communicate(timeout=90)[0] for racer in racers).split()
    assert said.count("wrote") == 1
    assert len(set(said) - {"wrote"}) == 1


def test_what_a_killed_packer_left_is_cleaned_up(corpus: Path, tmp_path: Path) -> None:
    """A half-written folder is never taken for shards, and does not stay."""
    folder = pack(str(corpus), tmp_path / "cache").folder
    left = folder.rename(folder.with_name(f"{folder.name}.partial-1234"))
    assert pack(str(corpus), tmp_path / "cache").folder == folder
    assert not left.exists()


def test_a_full_disk_leaves_nothing_behind(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes through as it is, what was written is removed, and the next try works."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shards.os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            pack(str(corpus), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert pack(str(corpus), tmp_path / "cache").train.tokens


def test_a_truncated_shard_is_noticed(corpus: Path, tmp_path: Path) -> None:
    """The error names the file and the remedy."""
    packed = pack(str(corpus), tmp_path / "cache")
    shard = next(packed.folder.glob("train-*.bin"))
    os.truncate(shard, 10)
    with pytest.raises(DamagedShards, match=rf"{shard.name}: 10 bytes, the index says \d+; remove"):
        pack(str(corpus), tmp_path / "cache")


def test_a_trained_vocabulary_is_smaller_than_bytes_and_deterministic(corpus: Path, tmp_path: Path) -> None:
    """Byte pairs learnt from the text shorten it, and learning twice gives the same tokens."""
    plain = pack(str(corpus), tmp_path / "cache")
    one = pack(str(corpus), tmp_path / "cache", vocabulary="bpe", vocabulary_size=300)
    two = pack(str(corpus), tmp_path / "again", vocabulary="bpe", vocabulary_size=300)
    assert one.train.tokens < plain.train.tokens / 2
    assert one.digest == two.digest
    assert one.vocabulary_size <= 300
    assert (one.folder / "tokenizer.json").exists()


def test_nothing_to_read_is_said_at_once(tmp_path: Path) -> None:
    """A folder that does not exist or holds no text is named."""
    with pytest.raises(NoText, match=r"data\.text: 'nowhere' is neither 'stdlib' nor an existing file or folder"):
        find_documents("nowhere")
    with pytest.raises(NoText, match="no files below"):
        find_documents(str(tmp_path))


def test_the_standard_library_is_found_without_its_tests() -> None:
    """Sorted sources of every machine's Python, nothing from site-packages."""
    names = [document.name for document in find_documents("stdlib")]
    assert "asyncio/base_events.py" in names
    assert names == sorted(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
