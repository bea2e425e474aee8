/* SPDX-License-Identifier: GPL-2.0 */
/* The DMA operations of one device, shared by dma.c and dma_ops.c. */
#ifndef UVMM_DMA_H
#define UVMM_DMA_H

#include <linux/dma-map-ops.h>
#include <linux/hashtable.h>
#include <linux/workqueue.h>

struct uvmm_bridge;

struct uvmm_dma {
	struct dma_map_ops ops;
	struct uvmm_bridge *bridge;
	u64 required_mask;
	/* Mappings that the device may write at this moment. */
	long __percpu *live;
	/* Tasks that may sleep in an operation. */
	atomic_t allocating;
	/* Coherent memory: struct uvmm_coherent by address. */
	spinlock_t lock;
	DECLARE_HASHTABLE(coherent, 6);
	struct work_struct retire;
};

struct uvmm_coherent {
	struct hlist_node node;
	void *start;
	size_t size;
};

extern const struct dma_map_ops uvmm_dma_ops;

struct uvmm_dma *uvmm_dma_of(struct device *dev);
void uvmm_touch(void *start, size_t size);
bool uvmm_coherent_add(struct uvmm_dma *dma, void *start, size_t size,
		       gfp_t gfp);
void uvmm_coherent_forget(struct uvmm_dma *dma, void *start);

#endif
