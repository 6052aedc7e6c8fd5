"""What holds for all tests and the programs that they start. It is set before torch and FAISS are imported."""

import os

# Threads of OpenMP wait for one another by spinning, so two processes that share two cores take time from each other.
# A batch of 16 images (32 pixels) then took 0.2 to 0.6 s of CPU time; with threads that sleep it takes 0.016 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Programs keep what they compiled: 150 modules of ours, which took each of them 0.13 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
