"""Models that run inside Triton's Python backend; `model.py` in a repository imports one of them."""
