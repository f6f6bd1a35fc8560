"""What holds for all tests: one thread a process, so that numbers do not depend on the machine's cores."""

import os

for _library in ("OMP", "MKL", "OPENBLAS"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"  # read when torch is first imported, here and in child processes
