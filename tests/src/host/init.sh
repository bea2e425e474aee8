#!/bin/busybox sh
# The first program of the lab host: puts a writable layer over the root of the machine that
# runs the lab, enters it and starts the agent. /agent-path says where that is.
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
for module in $(busybox cat /modules/order); do busybox insmod "$module"; done
busybox mkdir -p /below /layer /root
busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap,ro root /below
busybox mount -t tmpfs -o size=80% layer /layer
busybox mkdir /layer/upper /layer/work
busybox mount -t overlay -o lowerdir=/below,upperdir=/layer/upper,workdir=/layer/work root /root
for dir in proc sys dev; do busybox mount --move /$dir /root/$dir; done
busybox mkdir -p /root/dev/pts /root/dev/shm
busybox mount -t devpts -o ptmxmode=666 devpts /root/dev/pts
busybox mount -t tmpfs shm /root/dev/shm
busybox mount -t tmpfs -o mode=755 run /root/run
# The shell stays the first process and collects what is orphaned; without its agent the host ends.
agent=$(busybox cat /agent-path)
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec /bin/busybox switch_root /root /bin/sh -c '"$0" agent; echo o > /proc/sysrq-trigger; sleep 60' "$agent"
