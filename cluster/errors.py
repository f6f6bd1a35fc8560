"""Errors of `cluster`, one tree: every message says what was wrong, where, and what would be right."""


class ClusterError(Exception):
    """Root of every error raised by this package."""


class BadTask(ClusterError, ValueError):
    """A task that cannot be run as described: spec not JSON, call not importable, `out` not its own."""


class BadConfig(ClusterError, ValueError):
    """An unknown key or an impossible value in the `cluster` section of the parameters."""


class CannotRun(ClusterError):
    """An executor that does not exist here, or a request no machine of this executor can meet."""


class CorruptResult(ClusterError):
    """A published folder that does not agree with its manifest."""


class Fenced(ClusterError):
    """An attempt lost its lease: another one took its place, so it must not publish."""


class StoreUnavailable(ClusterError):
    """The file system of the store kept failing (EIO, ESTALE, ...): nothing is known of what lies there."""


class Locked(ClusterError):
    """Another run holds the lock of this store and label."""


class TasksFailed(ClusterError):
    """Some tasks of a run failed; the message is a table of name, cause, last log lines and log file."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped a run, after all it had started was cleaned up; to who knows us not it is Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.exit_code = 128 + signum  # what shells say of a program ended by it: 130 for Ctrl-C, 143 for SIGTERM


class Stopped(KeyboardInterrupt):
    """`progress` says so to a task that is to stop, since its machine is needed or its time is nearly up.

    A task that has something to save writes it to `resume/`, and raises it again. To others it is Ctrl-C.
    """
