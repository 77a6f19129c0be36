"""The fixtures of these tests; what they are made of is in tiny_job.py."""

from tiny_job import job  # noqa: F401
