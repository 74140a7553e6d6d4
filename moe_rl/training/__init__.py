"""Training: the run, its loop, its gradients, its state, its cold start."""
