"""Score captions: COCO's metrics, CLIPScore, and whether a captioner uses the image."""
