"""`fptq-export doctor`: what this machine has, and whether an engine will load on it."""
