"""What comes next, from what a user chose before, and how transitions between items help: python examples/recommend.py [EPOCHS]"""

import sys

import torch

from regard.zoo.systems.mqsa_ted import MQSATED, ranking, transition_counts

epochs, items, users = int(sys.argv[1]) if len(sys.argv) > 1 else 6, 150, 400
torch.manual_seed(0)
follows = torch.cat((torch.zeros(1, dtype=torch.long), torch.randperm(items) + 1))  # what a user likes after each item; item 0 is padding
rows = [torch.randint(1, items + 1, (users,))]
for _ in range(15):
    rows.append(torch.where(torch.rand(users) < 0.4, follows[rows[-1]], torch.randint(1, items + 1, (users,))))
histories = torch.stack(rows, 1)
histories[: users // 2, :6] = 0  # half of the users are newer
counts = transition_counts(histories, items)

for kd in (0.0, 0.1):
    torch.manual_seed(0)
    model = MQSATED(items, dim=32, length=16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(users).split(50):
            loss = model.total(histories[batch, :-1], histories[batch, 1:], counts, kd)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        scores = model.eval()(histories)[:, -1]  # (users, items): of what comes after the last item
    hit, gain = ranking(scores, follows[histories[:, -1]])
    print(f"distillation {kd}: the liked item is among the first ten for {hit:.0%} of users, NDCG@10 {gain:.3f}")
