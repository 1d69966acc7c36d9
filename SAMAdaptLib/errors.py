"""Errors that reach a person: each message says what was wanted, what came and what to do."""

from __future__ import annotations


class SAMAdaptError(Exception):
    """Base of every error that a user can act on; front ends show its text as one sentence."""


class GeometryError(SAMAdaptError):
    """A grid, a transform or a slice that cannot be used as it is."""


class VolumeError(SAMAdaptError):
    """Voxels that cannot be read or segmented."""


class PromptError(SAMAdaptError):
    """A prompt that does not fit the volume or the model."""


class WeightsError(SAMAdaptError):
    """A checkpoint that is missing, damaged, unsafe or of another network."""


class CardError(SAMAdaptError):
    """An unknown model name or a card that does not hold what it must."""


class DeviceError(SAMAdaptError):
    """A processor or memory that cannot do what was asked."""


class DicomError(SAMAdaptError):
    """A DICOM series or segmentation that cannot be read or written."""


class JobError(SAMAdaptError):
    """A prompt file, a job or a record that cannot be followed."""


class CancelledError(SAMAdaptError):
    """The user stopped the work; what was finished is kept."""
