"""The exceptions this package raises. Each also is the built-in type that callers of such code expect."""


class OpenLlamaError(Exception):
    """Anything openllama refuses to do; the command line prints it as one line."""


class ConfigError(OpenLlamaError, ValueError):
    """A model configuration that is impossible, unsupported or contradicts the weights."""


class InputError(OpenLlamaError, ValueError):
    """An argument of a forward pass or of generate that cannot be right."""


class BackendError(OpenLlamaError, RuntimeError):
    """An attention backend that was asked for by name cannot run here."""


class TokenizerError(OpenLlamaError, ValueError):
    """Text that cannot be encoded, ids that cannot be decoded, or tokenizer files that cannot be read."""


class CheckpointError(OpenLlamaError):
    """Base of everything that can be wrong with files of weights."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A folder, shard, index or config that should be there is not."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """A file that is truncated, empty or not in the format its name promises."""


class UnsafePickleError(CheckpointError, ValueError):
    """A pickle that holds anything but plain tensors; it is never executed."""


class KeyMismatchError(CheckpointError, ValueError):
    """Unknown, missing, duplicate or mis-shaped weights; the message lists every one."""


class DestinationExistsError(CheckpointError, FileExistsError):
    """The place to write to is taken."""
