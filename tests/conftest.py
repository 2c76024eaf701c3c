"""Settings for every test. Imports no torch: tests/native runs under sanitizers, in a process without it."""

import os

from hypothesis import HealthCheck, settings

# Whatever a library would like to fetch from a hub, no test may: it fails at once instead of waiting for a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The first call into a kernel pays for thread pools and page faults, so a deadline would fail at random.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A submission is judged by the same examples each time; drawing new ones is for people at their desks.
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
