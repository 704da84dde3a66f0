"""Errors a user can act on: each names the thing, the value, what was expected and what to do."""

# Exit codes that ask to be started again; docs/runs.md says what each means. 77 and 78 do not: see below.
REQUEUE, PEER_LOST, STUCK = 42, 75, 76


class UserError(Exception):
    """Something outside the program is wrong; commands print the message alone and exit with `exit_code`."""

    exit_code = 1


class RecipeError(UserError):
    """A recipe that cannot run: unknown key, wrong type, impossible combination. Restarting does not help."""

    exit_code = 78


class DataError(UserError):
    """A source that is missing, empty, unreadable, or has more bad records than the recipe allows."""


class HubError(UserError):
    """A Hugging Face folder without what its family needs, or a model that cannot be written as one."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that does not hold what was saved: a run goes on from the one before."""


class NonFiniteError(UserError):
    """The loss or a gradient became NaN or infinite. Restarting from the same point does not help."""

    exit_code = 77


class PlanError(UserError):
    """A plan that cannot be made: devices nobody builds, a compiler that is missing, a file that cannot be written."""

    exit_code = 78


class DoesNotFit(UserError):
    """A program that needs more memory than its devices have. The plan is made, and says so."""

    exit_code = 3


class Stopped(UserError):
    """A run that was asked to stop and did so in good order: nothing is lost, the same command goes on."""

    def __init__(self, message: str, number: int | None = None):
        """Exit code 130 after Ctrl-C, as shells expect; 42, "start me again", after SIGTERM."""
        super().__init__(message)
        self.exit_code = 130 if number == 2 else REQUEUE


class BadRecord(Exception):
    """One record that cannot be used. It is skipped, counted under `reason` and logged with its `key`."""

    def __init__(self, reason: str, key: str = "", detail: str = ""):
        """`reason` is a short stable word for counting (`truncated`, `bomb`); `detail` is for the log."""
        super().__init__(f"{key or '?'}: {reason}{': ' + detail if detail else ''}")
        self.reason, self.key, self.detail = reason, key, detail

    def __reduce__(self):
        """Keep the three fields when a worker process sends the error to its parent."""
        return BadRecord, (self.reason, self.key, self.detail)
