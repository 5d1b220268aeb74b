"""Task suites beside Isaac Lab: DMControl and Meta-World as batched environments of torch tensors."""
