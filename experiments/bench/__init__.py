"""`moe-rl bench` (training, logprobs, routing, ranks), and two endurance tests: soak, lost_node."""
