"""How nbval waits for a cell, made to notice two things that it would not.

- **A kernel that dies** (os._exit, a crash, no memory left). nbval would wait for the cell's time limit, and call it a
  timeout. Here the process is looked at twice a second.
- **A flood of output.** nbval reads what was printed only after the cell has ended, all of it; a loop that prints for 20
  seconds makes gigabytes. Here it is read while the cell runs, and cut after MOST_PRINTED characters.

`install` puts both into nbval's RunningKernel, the class that talks to the kernel.
"""

import time
from collections import deque
from queue import Empty

from qlearn.course import cells  # noqa: F401 - first: it keeps the import of nbformat short

from nbval.kernel import RunningKernel  # isort: skip

MOST_PRINTED = 200_000
_GLANCE = 0.5  # seconds between two looks at the kernel


class KernelDied(Exception):
    """The kernel's process ended while a cell was running."""


class Kernel(RunningKernel):
    """nbval's kernel with a wait that keeps its eyes open."""

    def await_reply(self, msg_id, timeout=None):
        """Wait until the kernel has answered a request.  Raises queue.Empty after `timeout` seconds, or KernelDied."""
        self.arrived, self.room = deque(), MOST_PRINTED
        end = time.monotonic() + (timeout or float("inf"))
        while True:
            self._drain()
            try:
                message = super().get_message("shell", timeout=_GLANCE)
            except Empty:
                if not self.is_alive():
                    raise KernelDied("the kernel died") from None
                if time.monotonic() > end:
                    raise
                continue
            if message["parent_header"].get("msg_id") == msg_id:
                return

    def get_message(self, stream, timeout=None):
        """The next message: of the output channel, those first that arrived during the wait."""
        if stream == "iopub" and getattr(self, "arrived", None):
            return self.arrived.popleft()
        return self._cut(super().get_message(stream, timeout=timeout))

    def _drain(self):
        while True:
            try:
                self.arrived.append(self._cut(super().get_message("iopub", timeout=0)))
            except Empty:
                return

    def _cut(self, message):
        if message["msg_type"] == "stream":
            text = message["content"]["text"][: max(self.room, 0)]
            self.room -= len(text)
            message["content"]["text"] = text
        return message


def install():
    """Make nbval use this kernel."""
    from nbval import plugin

    plugin.RunningKernel = Kernel
