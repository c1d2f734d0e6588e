"""What is traced, made on meta tensors: a model of transformers, or what a user's function gives."""
