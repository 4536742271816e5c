"""The lines that decouplify adds to an ordinary PyTorch loop, marked with `# +`. Runs in about a minute on a CPU.

$ python examples/quickstart.py
"""

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import decouplify  # +
from decouplify.data import load_images

torch.manual_seed(0)
digits = load_images("digits")
train, test = (TensorDataset(*digits.tensors(split)) for split in ("train", "test"))
train_loader, test_loader = DataLoader(train, 64, shuffle=True), DataLoader(test, 250)

model = timm.create_model("test_resnet", num_classes=10, in_chans=1)


def accuracy(network: torch.nn.Module) -> float:
    network.eval()
    with torch.no_grad():
        right = sum((network(images).argmax(1) == labels).sum().item() for images, labels in test_loader)
    return 100 * right / len(test)


# A dense network; a pretrained one serves as well.
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
for _ in range(8):
    model.train()
    for images, labels in train_loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
print(f"dense:     {accuracy(model):.1f} %")

decouplify.wrap(model, input_size=(1, 32, 32), input_norm=True)  # + one controller per convolution, all gates open
criterion = decouplify.losses.DecouplingLoss(model, target="2.0x")  # +
groups = decouplify.losses.parameter_groups(model, lr=0.02, weight_decay=5e-4)  # + gates learn ten times faster
optimizer = torch.optim.SGD(groups, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
for epoch in range(12):
    model.train()
    criterion.target_scale = min(1.0, epoch / 4)  # + approach the target step by step
    model.decoupling.noise = max(0.0, 1 - epoch / 9)  # + less and less noise on the gates,
    model.decoupling.hard = epoch >= 9  # + and at the end binary gates, as in evaluation
    for images, labels in train_loader:
        loss = F.cross_entropy(model(images), labels)
        loss = loss + criterion(labels)  # +
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
print(f"decoupled: {accuracy(model):.1f} %")

paths = decouplify.record(model, test_loader)  # + which filters each image used
print(paths.filter_states().headline())
print(f"{paths.distinct()} distinct paths of {len(paths)} images; class accuracy of paths {paths.knn_accuracy():.2f}")
images = next(iter(test_loader))[0]
print(decouplify.count_macs(model, images))  # +

fast = decouplify.sparsify(model)  # + computes only what each path needs
print(decouplify.verify(model, fast, images[:20]))  # +
