"""What the user keeps: a plan with its evidence, as data, text, HTML and JUnit."""
