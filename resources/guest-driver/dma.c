// SPDX-License-Identifier: GPL-2.0
/*
 * Keeps the promise that each page that a device wrote is written by a
 * processor as well, so that the host's log of those has it.
 *
 * A device gets operations of its own before its driver is bound. They map
 * just as the kernel's direct mapping does: a device can be given back to that
 * at any time, with whatever it has mapped.
 *
 * A guest that bounces all DMA (swiotlb=force) keeps the promise without.
 */
#include <linux/delay.h>
#include <linux/dma-direct.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/swiotlb.h>

#include "dma.h"
#include "uvmm_bridge.h"

#ifdef CONFIG_HIGHMEM
#error "all memory must have an address in the kernel"
#endif

static bool break_promise;
module_param(break_promise, bool, 0444);
MODULE_PARM_DESC(break_promise, "promise, but write nothing: a test must see guests break");

static struct workqueue_struct *retiring;

/* The device's, or NULL if the kernel's own apply (again). */
struct uvmm_dma *uvmm_dma_of(struct device *dev)
{
	const struct dma_map_ops *ops = READ_ONCE(dev->dma_ops);

	if (!ops || ops->alloc != uvmm_dma_ops.alloc)
		return NULL;
	return container_of(ops, struct uvmm_dma, ops);
}

/*
 * Writes to each page of the range what is there, in one step, in case another
 * processor does not know that the range is not its own at the moment.
 */
void uvmm_touch(void *start, size_t size)
{
	u8 *at = start, *end = at + size;

	if (break_promise)
		return;
	while (at < end) {
		u8 is = READ_ONCE(*at);

		cmpxchg(at, is, is);
		at = (u8 *)PAGE_ALIGN((unsigned long)at + 1);
	}
}

bool uvmm_coherent_add(struct uvmm_dma *dma, void *start, size_t size, gfp_t gfp)
{
	gfp_t plain = gfp & ~(__GFP_DMA | __GFP_DMA32 | __GFP_ZERO);
	struct uvmm_coherent *memory = kmalloc(sizeof(*memory), plain);
	unsigned long flags;

	if (!memory)
		return false;
	memory->start = start;
	memory->size = size;
	spin_lock_irqsave(&dma->lock, flags);
	hash_add(dma->coherent, &memory->node, (unsigned long)start);
	spin_unlock_irqrestore(&dma->lock, flags);
	return true;
}

void uvmm_coherent_forget(struct uvmm_dma *dma, void *start)
{
	struct uvmm_coherent *memory, *found = NULL;
	unsigned long flags;

	spin_lock_irqsave(&dma->lock, flags);
	hash_for_each_possible(dma->coherent, memory, node,
			       (unsigned long)start) {
		if (memory->start == start) {
			hash_del(&memory->node);
			found = memory;
			break;
		}
	}
	spin_unlock_irqrestore(&dma->lock, flags);
	kfree(found);
}

/* Only while the device is quiet: it may own what is touched otherwise. */
void uvmm_dma_touch_coherent(struct device *dev)
{
	struct uvmm_dma *dma = uvmm_dma_of(dev);
	struct uvmm_coherent *memory;
	unsigned long flags;
	int bucket;

	if (!dma)
		return;
	spin_lock_irqsave(&dma->lock, flags);
	hash_for_each(dma->coherent, bucket, memory, node)
		uvmm_touch(memory->start, memory->size);
	spin_unlock_irqrestore(&dma->lock, flags);
}

/* How many mappings the device may write. */
long uvmm_dma_live(struct device *dev)
{
	struct uvmm_dma *dma = uvmm_dma_of(dev);
	long live = 0;
	int cpu;

	if (dma)
		for_each_possible_cpu(cpu)
			live += *per_cpu_ptr(dma->live, cpu);
	return live;
}

bool uvmm_dma_promises(struct device *dev)
{
	return is_swiotlb_force_bounce(dev) || uvmm_dma_of(dev);
}

/*
 * Frees what nobody can use any more. A task may have found the operations
 * just before they were taken away: it runs, or was interrupted, in code that
 * does not sleep, but for allocations, which are counted.
 */
static void uvmm_dma_retire(struct work_struct *work)
{
	struct uvmm_dma *dma = container_of(work, struct uvmm_dma, retire);
	struct uvmm_coherent *memory;
	struct hlist_node *next;
	int bucket;

	synchronize_rcu();
	synchronize_rcu_tasks();
	while (atomic_read(&dma->allocating))
		msleep(20);
	synchronize_rcu_tasks();
	hash_for_each_safe(dma->coherent, bucket, next, memory, node)
		kfree(memory);
	free_percpu(dma->live);
	kfree(dma);
}

/* To be called with the device locked, before its driver is bound. */
int uvmm_dma_install(struct uvmm_bridge *bridge, struct device *dev)
{
	struct uvmm_dma *dma;

	/* Behind an IOMMU, or not coherent: more than direct mapping. */
	if (get_dma_ops(dev) || device_iommu_mapped(dev) ||
	    !dev_is_dma_coherent(dev))
		return -EOPNOTSUPP;
	dma = kzalloc(sizeof(*dma), GFP_KERNEL);
	if (!dma)
		return -ENOMEM;
	dma->live = alloc_percpu(long);
	if (!dma->live) {
		kfree(dma);
		return -ENOMEM;
	}
	dma->ops = uvmm_dma_ops;
	dma->bridge = bridge;
	dma->required_mask = dma_get_required_mask(dev);
	spin_lock_init(&dma->lock);
	hash_init(dma->coherent);
	INIT_WORK(&dma->retire, uvmm_dma_retire);
	smp_store_release(&dev->dma_ops, &dma->ops);
	return 0;
}

/* Gives the device back to direct mapping; whether it was not. Any context. */
bool uvmm_dma_remove(struct device *dev)
{
	struct uvmm_dma *dma = uvmm_dma_of(dev);

	if (!dma || cmpxchg(&dev->dma_ops, &dma->ops, NULL) != &dma->ops)
		return false;
	queue_work(retiring, &dma->retire);
	return true;
}

int uvmm_dma_start(void)
{
	retiring = alloc_workqueue("uvmm_bridge", WQ_UNBOUND, 0);
	return retiring ? 0 : -ENOMEM;
}

/* Returns when no device uses any operation of this module. */
void uvmm_dma_stop(void)
{
	destroy_workqueue(retiring);
}
