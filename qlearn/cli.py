"""The command `qlearn`: everything about the course that is not done in a notebook.

Each command is a function here that imports what it needs when it is called, so that `qlearn --help` answers at once.
What goes wrong through the user's input is one sentence on stderr and exit status 2; `grade` and `doctor` use 1 for
"not all of it".
"""

import argparse
import json
import sys
from pathlib import Path

_EXAMPLES = """\
the way through the course:
  qlearn doctor                          is everything installed?
  qlearn lab                             open JupyterLab on lesson 0
  qlearn hint absmax.quantize            one hint at a time
  qlearn grade exercises/02_absmax.ipynb points for an exercise
  qlearn progress                        where you are
  qlearn reset exercises/02_absmax.ipynb start an exercise over; your file is kept
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message):
        command = self.prog.partition(" ")[2]
        print(f"qlearn: {message}; see qlearn {command + ' ' if command else ''}--help", file=sys.stderr)
        raise SystemExit(2)


def main(arguments=None):
    """Run the command line.  Returns the exit status."""
    try:
        parser = _parser()
        options, more = parser.parse_known_args(arguments)
        if more and options.run is not _lab:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        options.more = more
        return options.run(options)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after an error
        return stop.code
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"qlearn: {error}", file=sys.stderr)
        return 2


def _parser():
    parser = _Parser(
        prog="qlearn",
        description="A course on quantizing language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run, name, summary, more):
        made = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {more}")
        made.set_defaults(run=run)
        return made

    add = command(_doctor, "doctor", "check that everything is installed", "One line per check: OK, or the remedy.")
    add.add_argument("--json", action="store_true", help="print the findings as JSON")

    more = "More arguments go to JupyterLab, for example: qlearn lab --no-browser --port=9000"
    command(_lab, "lab", "open JupyterLab on lesson 0", more)

    more = (
        "Your answers are put into the course's own solution and run there, so edited checks do not matter. "
        "The exit status is 0 for full points, 1 for less."
    )
    add = command(_grade, "grade", "points for an exercise notebook", more)
    add.add_argument("files", nargs="+", type=Path, metavar="FILE", help="such as exercises/02_absmax.ipynb")
    add.add_argument("--limit", type=float, default=20.0, metavar="S", help="seconds one cell may take (default 20)")
    add.add_argument("--json", action="store_true", help="print the points as JSON")

    add = command(_progress, "progress", "the tasks you have solved", "They are kept in a folder of your own.")
    add.add_argument("--json", action="store_true", help="print it as JSON")

    more = "Ask again for the second hint, and once more for the place of the solution."
    add = command(_hint, "hint", "a hint for a task", more)
    add.add_argument("task", metavar="TASK", help="its name, such as absmax.quantize")

    more = "What you wrote is kept in exercises/backups."
    add = command(_reset, "reset", "start an exercise over", more)
    add.add_argument("file", type=Path, metavar="FILE", help="such as exercises/02_absmax.ipynb")

    more = "With the name of a tensor, the numbers in one of its blocks, bit by bit."
    add = command(_inspect, "inspect", "what a GGUF file holds", more)
    add.add_argument("file", type=Path, metavar="FILE", help="such as model.gguf")
    add.add_argument("tensor", nargs="?", metavar="TENSOR", help="such as blk.0.attn_q.weight")
    add.add_argument("block", nargs="?", type=int, default=0, metavar="BLOCK", help="its number, the first by default")

    more = "On an NVIDIA GPU, beside what else is installed there. Two minutes."
    add = command(_bench, "bench", "time the kernels", more)
    add.add_argument("what", choices=["kernels"], help="kernels: those for the GPU")
    add.add_argument("--out", type=Path, metavar="FOLDER", help="where to write kernels.json; the package by default")

    more = "For authors: executes lessons/source and solutions/source and writes lessons, solutions and exercises."
    add = command(_build, "build", "build the notebooks from their sources", more)
    add.add_argument("names", nargs="*", metavar="NAME", help="which, such as 02_absmax or 02; all by default")
    add.add_argument("--check", action="store_true", help="only say which notebooks are not what their source gives")
    return parser


def _doctor(options):
    from qlearn.course import doctor

    findings = doctor.examine()
    print(json.dumps([vars(one) for one in findings], indent=1) if options.json else repr(findings))
    return 0 if findings.ok else 1


def _lab(options):
    from qlearn.course.lab import lab

    return lab(options.more)


def _grade(options):
    from qlearn.course.grade import grade

    grades = [grade(path, options.limit) for path in options.files]
    print(json.dumps([one.as_dict() for one in grades], indent=1) if options.json else "\n\n".join(map(str, grades)))
    return 0 if all(one.points == one.maximum for one in grades) else 1


def _progress(options):
    from qlearn.course import progress

    rows = progress.summary()
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        solved = sum(bool(task["solved"]) for task in row["tasks"])
        print(f"{row['notebook']}: {row['points']} of {row['maximum']} points, {solved} of {len(row['tasks'])} tasks")
        for task in row["tasks"]:
            print(f"  {'done' if task['solved'] else '    '}  {task['task']} ({task['points']})")
    return 0


def _hint(options):
    from qlearn.course.hints import hint

    hint(options.task)
    return 0


def _reset(options):
    from qlearn.course.reset import reset

    backup = reset(options.file)
    print(f"{options.file} is as it was in the beginning" + (f"; yours is kept as {backup}" if backup else ""))
    return 0


def _inspect(options):
    from qlearn.export import GGUFFile, dissect, inspect

    if options.tensor is None:
        print(inspect(options.file))
        return 0
    file = GGUFFile(options.file)
    kind, block = file.tensor(options.tensor).type.name, file.block(options.tensor, options.block)
    print(f"{options.tensor}, block {options.block}, {kind}: {block.tobytes().hex(' ')}\n")
    print("\n".join(map(str, dissect(block, kind))))
    return 0


def _bench(options):
    from qlearn.bench import kernels

    kernels.main(["--out", str(options.out)] if options.out else [])
    return 0


def _build(options):
    from qlearn.course import build

    if not options.check:
        build.build(names=options.names)
        return 0
    found = build.stale(names=options.names)
    print("\n".join(found) or "every notebook is the one its source gives")
    return 1 if found else 0
