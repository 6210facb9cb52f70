"""What every command does alike: its place, its workspace, its record and its card."""
