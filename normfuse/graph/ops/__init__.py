"""What is known of every operator."""
