"""A network run stage by stage over all samples, its biases corrected on the way: the plan, what is measured, who runs it."""
