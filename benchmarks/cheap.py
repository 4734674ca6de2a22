"Cheaper self-teachers than the default: candidates of worth.py"
import torch
from torch import nn

class PooledSelfTeacher(nn.Module):
    """Reads each level's mean and maximum over the positions, side by side, and no maps: BatchNorm, `depth` layers of
    `hidden` units, logits. Its refined maps are the student's, so it goes with `beta=0`"""
    def __init__(self, channels, n_out, hidden=1024, depth=2):
        super().__init__()
        n = 2*sum(channels)
        sizes = [n]+[hidden]*depth
        layers = [nn.BatchNorm1d(n)]
        for a,b in zip(sizes, sizes[1:]): layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], n_out))

    def forward(self, feats, preact=False):
        pooled = [f.flatten(2) for f in feats]
        return feats,self.layers(torch.cat([o for f in pooled for o in (f.mean(2),f.amax(2))], dim=1))
