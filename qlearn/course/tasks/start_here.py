"""The warm-up of lesson 00: how many bytes a pile of codes fills."""

from qlearn.course.tasks import Case, Mutant, Task
from qlearn.formats.integers import packed_size


def _cases():
    return [
        Case("one byte exactly", (8, 1)),
        Case("a layer of the model at 4 bits", (256 * 768, 4)),
        Case("a layer of the model at 3 bits", (256 * 768, 3)),
        Case("8 bits", (1000, 8)),
        Case("the last byte is not full", (5, 3)),
        Case("a single code", (1, 2)),
        Case("nothing", (0, 4)),
    ]


TASKS = (
    Task(
        name="start_here.packed_size",
        title="Warm-up: bytes on disk",
        points=1,
        minutes=2,
        difficulty=1,
        importance=3,
        reference=packed_size,
        cases=_cases,
        hints=(
            "First count the bits of all codes together; then ask how many bytes hold that many bits.",
            "A byte partly used is still a byte on disk: divide by 8, rounding up: -(-n // 8).",
        ),
        mutants=(
            Mutant(
                "bits for bytes",
                lambda count, bits: count * bits,
                "This is the number of bits; a byte has eight of them, so divide by 8.",
            ),
            Mutant(
                "last byte lost",
                lambda count, bits: count * bits // 8,
                "The division has to round up: a remainder, however small, fills one more byte.",
            ),
            Mutant(
                "one byte too many",
                lambda count, bits: count * bits // 8 + 1,
                "This is what you get when a byte is always added: only a remainder needs one.",
            ),
            Mutant(
                "each code padded to whole bytes",
                lambda count, bits: count * -(-bits // 8),
                "This is what you get when every code has bytes of its own; packed codes share them.",
            ),
            Mutant(
                "bytes per code first",
                lambda count, bits: count * (bits // 8),
                "This is what you get when bits // 8 is computed first: for 4 bits that is already 0.",
            ),
            Mutant(
                "nibbles for everyone",
                lambda count, bits: -(-count * 4 // 8),
                "This is the answer for 4 bits whatever `bits` says.",
            ),
            Mutant(
                "levels for bits",
                lambda count, bits: -(-count * 2**bits // 8),
                "This counts the 2**bits values that a code can take; to store one takes `bits` bits.",
            ),
            Mutant(
                "no code across two bytes",
                lambda count, bits: -(-count // (8 // bits)),
                "This is what you get when no code may lie across two bytes: packed, 8 codes of 3 bits fill 3 bytes.",
            ),
        ),
    ),
)
