"""A conversion: options become rewriters, one output is planned and carried out, and what came of it is told."""
