"""`fptq-export triton`: a model repository for Triton Inference Server, and the models that run in it."""
