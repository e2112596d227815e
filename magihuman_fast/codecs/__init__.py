"""What goes in and what comes out: text, pictures, sound and video files."""
