"""The program: its calls, what is known of every operator, and edits of it."""
