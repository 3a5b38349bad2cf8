"""How nbval waits for a cell, made to notice two things that it would not.

- **A kernel that dies** (os._exit, a crash, no memory left). nbval would wait for the cell's time limit, and call it a
  timeout. Here the process is looked at several times a second.
- **A flood of output.** nbval reads what was printed only after the cell has ended, all of it; a loop that prints for
  20 seconds makes gigabytes. Here it is read while the cell runs, kept up to MOST_KEPT characters, and a cell that
  prints more than MOST_PRINTED is interrupted as if its time were up.

`install` puts this kernel in the place of nbval's own, the class that talks to the kernel's process.
"""

import time
from collections import deque
from queue import Empty

from qlearn.course import cells  # noqa: F401 - first: it keeps the import of nbformat short

from nbval.kernel import RunningKernel  # isort: skip

MOST_KEPT = 200_000
MOST_PRINTED = 5_000_000
_GLANCE = 0.25  # seconds between two looks at the kernel


class KernelDied(Exception):
    """The kernel's process ended while a cell was running."""


class Kernel(RunningKernel):
    """nbval's kernel with a wait that keeps its eyes open."""

    def await_reply(self, msg_id, timeout=None):
        """Wait until the kernel has answered a request.

        timeout: in seconds.  Raises queue.Empty when it is over, or when the cell prints without end; KernelDied.
        """
        self.arrived, self.printed = deque(), 0
        end = time.monotonic() + (timeout or float("inf"))
        while True:
            self._read_output()
            if self.flooded or time.monotonic() > end:
                raise Empty
            try:
                message = super().get_message("shell", timeout=_GLANCE)
            except Empty:
                if not self.is_alive():
                    raise KernelDied("the kernel died") from None
                continue
            if message["parent_header"].get("msg_id") == msg_id:
                return

    @property
    def flooded(self):
        """Whether the present cell has printed more than anyone reads."""
        return self.printed > MOST_PRINTED

    def get_message(self, stream, timeout=None):
        """The next message: of the output, first those that arrived during the wait."""
        if stream == "iopub" and self.arrived:
            return self.arrived.popleft()
        return self._cut(super().get_message(stream, timeout=timeout))

    def _read_output(self):
        """Take what has arrived, without waiting; a flood has no end, so stop there."""
        while not self.flooded:
            try:
                self.arrived.append(self._cut(super().get_message("iopub", timeout=0)))
            except Empty:
                return

    def _cut(self, message):
        if message["msg_type"] == "stream":
            text = message["content"]["text"]
            message["content"]["text"] = text[: max(MOST_KEPT - self.printed, 0)]
            self.printed += len(text)
        return message


def install():
    """Make nbval use this kernel."""
    from nbval import plugin

    plugin.RunningKernel = Kernel
