"""The exceptions that a user can see. Each message is one line: what was found and what to do."""


class UserError(Exception):
    """The user's input is wrong. The command line prints only the message and exits with code 2."""


class ConfigError(UserError):
    """A recipe, a setting, a DeepSpeed configuration or a command-line argument is wrong."""


class InUseError(ConfigError):
    """Another process trains in the run directory."""


class DataError(UserError):
    """A text file, a data set or a corpus is missing or unusable."""


class CheckpointError(UserError):
    """A run directory, a checkpoint or an exported model is missing, broken or of another version."""


class Stopped(Exception):  # noqa: N818 - a requested stop is not an error
    """A signal stopped the run after a checkpoint was saved. The same command resumes the run. Exit code 75."""


class Failed(Exception):  # noqa: N818 - the name describes an outcome
    """An operation failed for a reason that fits in one line. No traceback is printed. Exit code 1."""


class Lost(Exception):  # noqa: N818 - the name describes an outcome
    """Another rank or its machine is gone. The same command resumes the run. Exit code 69."""


class StorageError(Failed):
    """A required file could not be written to the disk."""


class OutOfMemory(Failed):
    """The memory of a device or of the host was not sufficient. Every rank that meets this reports it. Exit code 1."""
