"""Folders of scans and images as training examples, and the synthesis of scans."""
