"""Inception with random weights, for tests that need the network and not what it was trained for."""

import io

import torch


def random_weights():
    """A state dict in which images stay distinguishable: batch norms are fitted to a few random images."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state, **options):
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        network = Untrained("inception", ["logits"], feature_extractor_weights_path=empty)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                module.bias.normal_(std=0.2)
        network.fc.weight.normal_(std=0.5)
        network.train()
        images = smooth_images(6, 16, seed=9).permute(0, 3, 1, 2)
        network(images)
        network.eval().features_list = ["2048"]
        mean = network(images)[0].mean(0)  # without it in the weights, images differ in the class they look like
        network.fc.weight -= torch.outer(network.fc.weight @ mean, mean) / mean.square().sum()
    return {name: value.clone() for name, value in network.state_dict().items()}


def smooth_images(count, side, seed):
    """uint8 (count, side, side, 3) of coloured blobs on noise."""
    stream = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=stream)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=stream)
    return (255 * noisy.clamp(0, 1)).byte().permute(0, 2, 3, 1).contiguous()
