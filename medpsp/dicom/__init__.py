"""DICOM, NIfTI and VOC files to our types."""
