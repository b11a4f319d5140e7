"""Tests in which each rank is a process."""
