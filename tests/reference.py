"""The self-teacher and losses, written out node by node as `shared/golden/README.md` defines them

Slow and simple, without the package's optimizations, and with the reference implementation's parameter names. The tests
compare the package with it where there is no golden file."""
import math, torch
import torch.nn as nn, torch.nn.functional as F

class P(nn.Module):
    "A path between maps: 1×1 convolution, BatchNorm, ReLU"
    def __init__(self, ni, nf):
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(ni, nf, 1, bias=False), nn.BatchNorm2d(nf)))
    def forward(self, x): return F.relu(self.conv(x))

class S(nn.Module):
    "A node: depthwise-separable 3×3 convolutions, each with a BatchNorm, and ReLUs in between"
    def __init__(self, d, depth):
        super().__init__()
        blocks = []
        for b in range(depth):
            convs = [nn.Conv2d(d, d, 3, padding=1, groups=d, bias=False), nn.Conv2d(d, d, 1, bias=False)]
            blocks.append(nn.Sequential(*([nn.ReLU()] if b else []), *convs, nn.BatchNorm2d(d)))
        self.conv = nn.Sequential(*blocks)
    def forward(self, x): return self.conv(x)

class SamePool(nn.Module):
    "3×3 max pooling at stride 2, padded with zeros to half the size, rounded up"
    def forward(self, x):
        (t,b),(l,r) = [(o//2,o-o//2) for o in (max((math.ceil(s/2)-1)*2+3-s, 0) for s in x.shape[-2:])]
        return F.max_pool2d(F.pad(x, (l,r,t,b)), 3, 2)

class Layer(nn.Module):
    "A BiFPN layer"
    def __init__(self, c, d, depth, first, scaled):
        super().__init__()
        n = len(c)
        path = P if scaled else lambda ni,nf: nn.Identity()
        if first: self.lat_conv = nn.ModuleList(P(c[i], d[i]) for i in range(n))
        self.lat_conv2 = nn.ModuleList(P(c[i], d[i]) for i in range(1, n))
        def up(i): return nn.Sequential(nn.Upsample(scale_factor=2, mode='nearest'), path(d[i+1], d[i]))
        self.up_sample = nn.ModuleList(map(up, range(n-1)))
        self.down_sample = nn.ModuleList(nn.Sequential(SamePool(), path(d[i-1], d[i])) for i in range(1, n))
        self.up_conv = nn.ModuleList(S(d[i], depth) for i in range(n-1))
        self.down_conv = nn.ModuleList(S(d[i], depth) for i in range(1, n))
        self.up_weight = nn.ParameterList(torch.ones(2) for _ in range(n-1))
        self.down_weight = nn.ParameterList(torch.ones(3 if i<n-1 else 2) for i in range(1, n))
    def forward(self, feats):
        n = len(feats)
        a = [o(f) for o,f in zip(self.lat_conv, feats)] if hasattr(self, 'lat_conv') else feats
        b = [None]+[o(f) for o,f in zip(self.lat_conv2, feats[1:])]
        fuse = lambda v,*xs: sum(w*x for w,x in zip(F.relu(v)/(F.relu(v).sum()+1e-6), xs, strict=True))
        u = {n-1: a[n-1]}
        for i in reversed(range(n-1)):
            u[i] = self.up_conv[i](fuse(self.up_weight[i], a[i], self.up_sample[i](F.relu(u[i+1]))))
        t = [u[0]]
        for i in range(1, n):
            mid = [F.relu(u[i])] if i<n-1 else []
            down = self.down_sample[i-1](F.relu(t[-1]))
            t.append(self.down_conv[i-1](fuse(self.down_weight[i-1], b[i], *mid, down)))
        return [F.relu(o) for o in t]

class Reference(nn.Module):
    "The self-teacher"
    def __init__(self, channels, n_out, width=2, depth=2, repeat=1, n_channels=None):
        super().__init__()
        d = [n_channels or max(1, round(width*c)) for c in channels]
        layer = lambda r: Layer(d if r else channels, d, depth, r==0, n_channels is None)
        self.layers = nn.ModuleList(map(layer, range(repeat)))
        self.fc = nn.Linear(d[-1], n_out)
    def forward(self, feats):
        for layer in self.layers: feats = layer(feats)
        return feats,self.fc(feats[-1].mean((2,3)))

def kd(s, t, K):
    "Compute the soft-label loss"
    p,q = (t.detach()/K).softmax(1),(s/K).softmax(1)
    return (p*(p.log()-q.log())).sum(1).mean()*K**2

def attention(feats, refined):
    "Compute the attention loss"
    def phi(x):
        a = (x**2).mean(1).flatten(1)
        return a/a.norm(dim=1, keepdim=True)
    return sum(((phi(f)-phi(t.detach()))**2).mean() for f,t in zip(feats, refined))
