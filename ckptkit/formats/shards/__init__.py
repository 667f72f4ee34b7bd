"""What sharded checkpoints are made of: facts of a set of shards, shared descriptors, and the planning of new ones."""
