"""What a file is held to, as findings: by the policy, by the manifest, and by a model that it must fit."""
