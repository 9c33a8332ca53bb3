"""Scores of generated images, one a file: a function and a script. `METRICS` says which there are."""

METRICS = {  # module of this package: what its number says
    "IS": "Inception score: do the images look like one thing each, and like many things together",
    "FID": "Fréchet distance of features: generated against real images as two clouds",
    "KID": "kernel distance of features: as FID, fair for few images too",
    "precision_recall": "share of generated images that could be real, and of real ones that could be generated",
    "LPIPS": "perceptual distance: diversity for one caption, or generated against real image by image",
    "R_precision": "how often an image's own caption is found among 99 others",
    "CLIP": "CLIPScore and CLIP-R-precision: do images and captions match for a network that no generator trained with",
    "attributes": "ToyBirds only: how many of the attributes that captions name the images show",
    "mask_iou": "ToyBirds only: how well the generator's masks cover the birds",
}
