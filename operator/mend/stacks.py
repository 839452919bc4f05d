"""Pure: what a rank was seen doing, in words: the frame it stands in, and what the kernel says of its main thread."""

from __future__ import annotations

from collections.abc import Iterator

from mend.evidence import RankEvidence

LIBRARIES = ("/lib/python", "/site-packages/", "/dist-packages/", "<frozen ")
BUSY_SHARE = 0.25  # of the time between two looks; who waits uses none, who computes shares the CPU with others


def seen_at(rank: RankEvidence) -> str:
    """What the rank was seen doing, as ' (at file:line in function, busy)'; "" if nothing was seen."""
    seen = [f"at {frame}"] if (frame := own_frame(rank.stack)) else []
    seen += [words] if (words := doing(rank)) else []
    return f" ({', '.join(seen)})" if seen else ""


def doing(rank: RankEvidence) -> str:
    """What the kernel says of its main thread, and Python of the GIL; "" if they say nothing remarkable."""
    if rank.python_answers is False:
        return "the GIL is held"
    if rank.cpu_share >= BUSY_SHARE:
        return f"busy: {rank.cpu_share:.0%} of a CPU"
    if rank.process_state == "D":
        return f"in the kernel's {rank.kernel_function or 'unknown function'}"
    return ""


def own_frame(stack: str) -> str:
    """The innermost frame of the main thread that is of no library: where a person would look first."""
    frames = list(_frames(stack))
    return next((where for path, where in frames if not any(word in path for word in LIBRARIES)), top_frame(stack))


def is_in_own_code(stack: str) -> bool:
    """Whether the main thread stands in code that is of no library, and so in no call of torch's either."""
    innermost = next(_frames(stack), None)
    return innermost is not None and not any(word in innermost[0] for word in LIBRARIES)


def top_frame(stack: str) -> str:
    """The innermost frame of faulthandler's last thread, which is the main one: 'train.py:12 in step'."""
    return next((where for _, where in _frames(stack)), "")


def _frames(stack: str) -> Iterator[tuple[str, str]]:
    """File and 'file:line in function' of each frame of the main thread, innermost first."""
    lines = [line.strip() for line in stack.splitlines()]
    heads = [n for n, line in enumerate(lines) if line.startswith(("Thread ", "Current thread "))]
    for line in lines[heads[-1] + 1 :] if heads else []:
        parts = line.split('"')
        if len(parts) < 3:
            return
        where = parts[2].replace(", line ", ":").strip()
        yield parts[1], f"{parts[1].rsplit('/', 1)[-1]}{where}"
