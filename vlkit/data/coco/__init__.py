"""Download COCO: fetch, verify and unpack its images and captions, and resume where a download stopped."""
