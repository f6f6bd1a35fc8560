"""What can go wrong, in one small tree. Every message says what was wrong, where, and what would be right."""


class OcvtpError(Exception):
    """Any error that ocvtp raises on purpose."""


class BadInput(OcvtpError, ValueError):
    """What the caller gave cannot be used: a file, a key, a shape, a value."""


class Incompatible(BadInput):
    """Two parts that are each sound do not fit: a pruner of another VLM, layer or width, shards of another run."""


class Corrupt(OcvtpError):
    """Data on disk is not what its manifest or checksum says."""


class NotAvailable(OcvtpError, RuntimeError):
    """Something needed is not on this machine: weights, a data set, a package, a device."""
