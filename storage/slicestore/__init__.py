"""Volumes on disk: raw scans in, seeded splits of training slices out.

numpy, scipy, SimpleITK and zarr; never torch, never Ray.
"""
