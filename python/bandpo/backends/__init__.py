"""What computes the loss of a token: compiled code, a CUDA kernel, or plain torch."""
