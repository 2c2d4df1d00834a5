"""What both halves of `bench` share: programs in processes of their own, and their table."""
