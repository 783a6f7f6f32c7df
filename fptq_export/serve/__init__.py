"""`fptq-export serve`: what was exported, behind the HTTP interface that OpenAI's clients speak."""
